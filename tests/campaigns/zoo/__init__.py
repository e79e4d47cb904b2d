"""Every architecture in the installed transformers that a tiny configuration can build, checked branch by branch."""
