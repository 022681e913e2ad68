//! One case per instruction form: every form runs on inputs that matter and on random bits, and each result is compared with an
//! independent computation of the instruction's meaning. Exhaustive where one operand has 16 bits.
//!
//! Each case runs twice: its code directly, once per instruction set of this machine (with lanes switched off, which must keep
//! their registers), and from PTX text through parser and interpreter. A test fails with the names of all its forms that do.

mod approx;
mod compare;
mod convert;
mod floats;
mod halves;
mod harness;
mod integers;
mod matrix;
mod reference;
mod words;
