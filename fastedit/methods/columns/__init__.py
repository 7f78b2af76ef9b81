"""Methods that choose single columns of any layer and train or rewrite them: FiNE, KNE, KN."""
