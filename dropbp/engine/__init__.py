"""Acts on masks: what runs around the modules of an enabled model."""
