"""The launchers and the sweeper that Hydra finds; they hold only what Hydra asks for."""
