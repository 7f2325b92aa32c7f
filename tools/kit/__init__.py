"""What the authors' commands, the tests and the pages' extensions share."""
