"""HCCL is not simulated: there is one device."""

raise ImportError("HCCL, Gaudi's collective communication, is not simulated; the simulated HPU runs in one process")
