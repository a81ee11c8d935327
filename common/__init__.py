"""What the scripts share: seeding, logging and the plumbing around a run. Nothing of an algorithm lives here."""
