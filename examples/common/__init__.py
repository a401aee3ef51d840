"""What the examples that train on emoji share: runs and their results, intervals, the structure losses of a table."""
