"""The loop: `engine.fit`, its optimizers (`optim`) and schedules."""
