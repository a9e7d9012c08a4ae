"""What Hydra finds of rlx: launchers and a sweeper. They hold nothing but what Hydra asks for."""
