"""Run the work items of a stage in one process or on many."""
