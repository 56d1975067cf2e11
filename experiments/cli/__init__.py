"""What all commands share: flags, errors, interrupts, progress."""
