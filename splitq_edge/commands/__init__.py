"""What each command of the command line does; heavy imports happen here, not in cli.py."""
