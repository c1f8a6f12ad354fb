"""What a run writes: one module for each format that other tools read."""
