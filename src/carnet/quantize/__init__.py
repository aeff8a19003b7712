"""Number formats of few bits, and how weights become them: pure arithmetic on arrays, no file and no architecture."""
