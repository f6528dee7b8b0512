"""For whom: the doors people use. Assembly happens only here."""
