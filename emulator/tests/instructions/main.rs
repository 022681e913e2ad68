//! One case per instruction form. Every form runs on special values and on random bits, and each result is compared
//! with an independent computation of the instruction's meaning; exhaustively where one operand has 16 bits.
//!
//! Each case runs twice: its code directly, once per instruction set of this machine (with lanes switched off, which
//! must keep their registers), and from PTX text through parser and interpreter. A failing test names all of its
//! failing forms.

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
