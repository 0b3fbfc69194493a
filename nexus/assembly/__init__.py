"""From a trained student to what a person keeps: its held-out scores, its report, its bundle."""
