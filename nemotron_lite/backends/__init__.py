"""The fast forms of the operations, and the choice between them (`dispatch`)."""
