"""Mutation fuzzing: corrupts valid files at random and reads them. Readers must refuse them or read them correctly."""
