"""The examiner: a second opinion on a target. It shares no code with the planner and the executor."""
