"""Tasks: a model, its loss and its data. One file a task; configs/task names it."""
