"""Does it learn? Loss at equal time, FLOPs and memory, and accuracy with the paper's tasks."""
