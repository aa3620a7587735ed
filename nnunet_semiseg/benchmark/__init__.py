"""Does a method work? Trainers x label budgets x seeds on one dataset, all through stock ``nnUNetv2_train``."""
