"""The hot steps, one public function per file, each with a plain-torch reference beside it."""
