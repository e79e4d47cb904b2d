"""What the parts share: records of runs, options, processes, models and the ways to train them."""
