"""Where Ray lives: teacher, trainer and student actors, the pool that feeds them, and the stages of a run."""
