"""The device functions in which one rule differs from another; everything else is the same for every norm."""
