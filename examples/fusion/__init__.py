"""A small model that fuses pictures and language, pre-trained with each structure loss and asked about what it sees."""
