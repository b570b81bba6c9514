"""One rule a file: ``coefficients`` forward, ``coefficients_vjp`` backward; everything else is the same for every norm."""
