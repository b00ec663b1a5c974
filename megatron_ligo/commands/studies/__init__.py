"""Commands that predict, compare and measure."""
