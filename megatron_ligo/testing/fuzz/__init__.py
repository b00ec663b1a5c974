"""Mutation fuzzing: valid files are corrupted at random and read; each must be refused or read as it now stands."""
