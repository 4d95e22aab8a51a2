"""Floor 1: who am I, who are my peers, where do tokens live, how do they travel."""
