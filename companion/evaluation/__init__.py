"""Numbers with intervals: losses, accuracies, metrics, bytes and time."""
