//! Betas one by one from a file: `betas=FILE.npy`.

use std::fs::File;
use std::io::BufReader;

use npyz::{NpyFile, TypeChar};

/// The betas in a `.npy` file with one dimension, f32 or f64.
///
/// # Errors
/// A clause, with the file.
pub fn read(path: &str) -> Result<Vec<f64>, String> {
    if !path.to_lowercase().ends_with(".npy") {
        return Err("a .npy file with a beta for each timestep is expected (Adam's betas are 0.9 and 0.999)".into());
    }
    let failed = |what: &dyn std::fmt::Display| format!("{path} {what}");
    let file = File::open(path).map_err(|e| failed(&format_args!("cannot be read: {e}")))?;
    let damaged = |e: std::io::Error| failed(&format_args!("is damaged: {e}"));
    let npy = NpyFile::new(BufReader::new(file)).map_err(damaged)?;
    let shape = npy.shape().to_vec();
    if shape.len() != 1 {
        return Err(failed(&format_args!("has {} dimensions; a list of betas has one", shape.len())));
    }
    // No chain has more; the file's length is not trusted before.
    if shape[0] > crate::diffusion::schedule::MOST_TIMESTEPS as u64 {
        let most = crate::diffusion::schedule::MOST_TIMESTEPS;
        return Err(failed(&format_args!("holds {} betas; a chain has at most {most}", shape[0])));
    }
    let kind = match npy.dtype() {
        npyz::DType::Plain(kind) if kind.type_char() == TypeChar::Float => kind.size_field(),
        other => return Err(failed(&format_args!("holds {}; f32 or f64 is expected", other.descr()))),
    };
    match kind {
        4 => npy.into_vec::<f32>().map(|betas| betas.into_iter().map(f64::from).collect()).map_err(damaged),
        8 => npy.into_vec::<f64>().map_err(damaged),
        bytes => Err(failed(&format_args!("holds floats of {bytes} bytes; f32 or f64 is expected"))),
    }
}
