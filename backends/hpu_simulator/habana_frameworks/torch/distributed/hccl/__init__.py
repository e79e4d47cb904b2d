"""HCCL is not simulated: there is one process, with one device."""

raise ImportError("HCCL, Gaudi's collective communication, is not simulated; the simulated HPU runs in one process")
