"""Good files, changed at random and read again: each is refused with a message, or reads as what it says."""
