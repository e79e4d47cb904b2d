"""Does training still learn? Loss at equal time, FLOPs and memory, and accuracy on the paper's tasks."""
