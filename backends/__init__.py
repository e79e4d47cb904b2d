"""Device adapters, one module each, loaded by name through `dropbp.device`; never imported directly."""
