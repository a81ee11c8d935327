"""What the scripts share: the command line, seeding, logging and evaluation. Nothing here knows an algorithm."""
