"""Three small trained models, one per cache layout, and the tasks they were trained on."""
