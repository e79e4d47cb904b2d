"""Support for devices that record operations and compile them as graphs."""
