"""The built-in problem: small pictures of ten shapes, drawn by code, with a trained teacher and two classifiers."""
