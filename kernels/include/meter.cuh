// What training steps measure: one row per step, in device memory, which the host reads when the log asks.
#pragma once

// Host twin: parts of the chain of timesteps by which losses are summed.
constexpr int QUARTERS = 4;

// Host twin: what one training step measures.
struct MeterRow {
    double loss_sums[QUARTERS];  // sum of L_i over the images whose timestep is in the quarter
    double counts[QUARTERS];     // how many such images
    double grad_norm;            // norm of the gradient before clipping
    double clip;                 // the clipping factor
    double vlb_sum;              // sum of T times a term of the bound over the images, if the loss has one
    double right[QUARTERS];      // how many of the counted images a classifier has told rightly
};
