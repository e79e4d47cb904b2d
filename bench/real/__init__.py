"""Methods compared on a real pretrained model, with real questions and a decaying learning rate."""
