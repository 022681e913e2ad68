//! Launches in the style before CUDA 4, which some programs still use: block shape, shared bytes and parameters are set
//! on the function one by one, then it is launched.
//!
//! Settings persist for the next launch. Not here: texture parameters.

use super::call::{Answer, exports, refuse};
use super::codes::Code;
use super::launch::{self, Shape};
use super::module::Function;
use super::state::{Handle, driver};
use std::ffi::{c_int, c_uint, c_void};

/// Bytes of parameters that a function may be given this way.
const MOST_PARAMETERS: usize = 4096;

/// What was set on a function. A block with no threads until `cuFuncSetBlockShape` was called.
#[derive(Clone, Default)]
pub struct Staged {
    block: [u32; 3],
    dynamic_shared: u32,
    /// As long as `cuParamSetSize` or the last parameter says.
    parameters: Vec<u8>,
}

/// Changes what is set on a function.
fn stage(function: Handle, change: impl FnOnce(&mut Staged)) -> Answer {
    let function = driver()?.functions.get(function)?;
    change(&mut function.staged.lock().unwrap());
    Ok(())
}

fn set_parameter(function: Handle, offset: c_int, bytes: &[u8]) -> Answer {
    let end = usize::try_from(offset).ok().and_then(|at| at.checked_add(bytes.len()));
    let Some(end) = end.filter(|&end| end <= MOST_PARAMETERS) else {
        let count = bytes.len();
        return refuse(
            Code::INVALID_VALUE,
            format!("{count} bytes at offset {offset} do not fit the {MOST_PARAMETERS} bytes of parameters"),
        );
    };
    stage(function, |staged| {
        if staged.parameters.len() < end {
            staged.parameters.resize(end, 0);
        }
        staged.parameters[end - bytes.len()..end].copy_from_slice(bytes);
    })
}

fn launch_staged(function: Handle, width: c_int, height: c_int, stream: Handle) -> Answer {
    let staged = driver()?.functions.get(function)?.staged.lock().unwrap().clone();
    // A negative count becomes one that no grid has.
    let grid = [width as u32, height as u32, 1];
    let shape = Shape { grid, block: staged.block, dynamic_shared: staged.dynamic_shared, cooperative: false };
    launch::launch(function, shape, stream, |function: &Function| {
        launch::pack_buffer(&function.kernel, &staged.parameters)
    })
}

exports! { STAGED:
    fn cuFuncSetBlockShape(function: Handle, x: c_int, y: c_int, z: c_int) {
        if [x, y, z].into_iter().any(|threads| threads < 1) {
            return refuse(Code::INVALID_VALUE, format!("a block of {x} by {y} by {z} threads has none"));
        }
        stage(function, |staged| staged.block = [x, y, z].map(|threads| threads as u32))
    }

    fn cuFuncSetSharedSize(function: Handle, bytes: c_uint) {
        stage(function, |staged| staged.dynamic_shared = bytes)
    }

    fn cuParamSetSize(function: Handle, bytes: c_uint) {
        if bytes as usize > MOST_PARAMETERS {
            return refuse(Code::INVALID_VALUE, format!("{bytes} bytes of parameters are more than {MOST_PARAMETERS}"));
        }
        stage(function, |staged| staged.parameters.resize(bytes as usize, 0))
    }

    fn cuParamSeti(function: Handle, offset: c_int, value: c_uint) {
        set_parameter(function, offset, &value.to_le_bytes())
    }

    fn cuParamSetf(function: Handle, offset: c_int, value: f32) {
        set_parameter(function, offset, &value.to_le_bytes())
    }

    fn cuParamSetv(function: Handle, offset: c_int, value: *const c_void, bytes: c_uint) {
        if value.is_null() && bytes > 0 {
            return refuse(Code::INVALID_VALUE, "the pointer to the parameter is null");
        }
        let value = match bytes {
            0 => &[],
            bytes => std::slice::from_raw_parts(value.cast(), bytes as usize),
        };
        set_parameter(function, offset, value)
    }

    fn cuLaunch(function: Handle) {
        launch_staged(function, 1, 1, std::ptr::null_mut())
    }

    fn cuLaunchGrid(function: Handle, width: c_int, height: c_int) {
        launch_staged(function, width, height, std::ptr::null_mut())
    }

    fn cuLaunchGridAsync(function: Handle, width: c_int, height: c_int, stream: Handle) {
        launch_staged(function, width, height, stream)
    }
}
