"""The operators: one file each, with its public function, checks, fake, gradient and table of backends."""
