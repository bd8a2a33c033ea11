#pragma once

#include <pybind11/pybind11.h>

// Adds the class TrainingStep.
void add_training(pybind11::module_& module);
