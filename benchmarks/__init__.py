"""What is fast, and how do we know: the suite of `multisa bench`, and one file for each subject."""
