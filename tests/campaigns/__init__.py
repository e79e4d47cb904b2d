"""Long runs by hand, each with a result file and a page: every architecture, every fault, every stack."""
