// What training steps measure: one row a step, written where it is computed and read by the host when the log asks.
#pragma once

// Host twin: parts of the timesteps by which losses are summed.
constexpr int QUARTERS = 4;

// Host twin: what one training step measures.
struct MeterRow {
    double loss_sums[QUARTERS];  // sum of L_i over the images whose timestep is in the quarter
    double counts[QUARTERS];     // how many they are
    double grad_norm;            // norm of the gradient before clipping
    double clip;                 // the factor that clips it
};
