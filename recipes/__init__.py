"""How the numbers that ship with the project were made."""
