//! Kernel launches: the driver's checks, packing of parameters, execution, and the aftermath of a fault.

use super::call::{Answer, Refusal, exports, refuse};
use super::codes::Code;
use super::device::{self, Figures};
use super::module::Function;
use super::occupancy;
use super::order;
use super::registered;
use super::settings::Run;
use super::state::{Context, Handle, current, driver};
use super::stream::{self, Stream};
use super::work::Work;
use crate::exec::{self, Launch};
use crate::ptx::Kernel;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Blocks in the grid, threads in a block, bytes of dynamic shared memory.
#[derive(Clone, Copy)]
pub struct Shape {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub dynamic_shared: u32,
    /// Every block must be able to wait for every other.
    pub cooperative: bool,
}

/// A launch, self-contained.
pub struct KernelLaunch {
    function: Arc<Function>,
    shape: Shape,
    params: Vec<u8>,
}

impl KernelLaunch {
    pub fn run(&self, context: &Context, stream: &Stream, run: &Run) -> Answer {
        self.function.check()?;
        let device = context.device()?;
        let launch = Launch {
            kernel: &self.function.kernel,
            module: &self.function.image.loaded,
            grid: self.shape.grid,
            block: self.shape.block,
            dynamic_shared: self.shape.dynamic_shared,
            params: &self.params,
            multiprocessors: driver()?.settings.multiprocessors,
            cooperative: self.shape.cooperative,
        };
        let mut spans = Vec::new();
        let launched = registered::with_mirrors(device, || match run.stream_order {
            true => exec::launch_noting(&device.memory, &launch, &run.exec, &mut spans),
            false => exec::launch(&device.memory, &launch, &run.exec),
        })?;
        match launched {
            Ok(counters) => {
                let name = &self.function.kernel.name;
                super::profile::count(name, counters)?;
                order::access(context, stream, run, &format!("kernel {name}"), false, &spans)
            }
            Err(fault) => {
                let message = fault.to_string();
                driver()?.profile.lock().unwrap().faults.push(message.clone());
                context.fail(Refusal { code: Code(fault.code() as c_int), message })
            }
        }
    }

    pub fn describe(&self) -> String {
        let ([gx, gy, gz], [bx, by, bz]) = (self.shape.grid, self.shape.block);
        let name = &self.function.kernel.name;
        format!("{name} ({gx},{gy},{gz}) x ({bx},{by},{bz})")
    }
}

fn check_shape(function: &Function, figures: &Figures, shape: Shape) -> Answer {
    let Shape { grid, block, .. } = shape;
    let kernel = &function.kernel;
    let name = &kernel.name;
    let wrong = |what: String| refuse(Code::INVALID_VALUE, format!("kernel {name}: {what}"));
    for (axis, at) in ["x", "y", "z"].into_iter().zip(0..) {
        let (blocks, threads) = (grid[at], block[at]);
        if blocks == 0 || blocks > figures.max_grid[at] {
            let most = figures.max_grid[at];
            return wrong(format!("the grid has {blocks} blocks in {axis}, it must be 1 to {most}"));
        }
        if threads == 0 || threads > figures.max_block[at] {
            let most = figures.max_block[at];
            return wrong(format!("the block has {threads} threads in {axis}, it must be 1 to {most}"));
        }
    }
    // Each factor is at most 1024 here.
    let threads: u32 = block.iter().product();
    if threads > device::MAX_THREADS {
        return wrong(format!("the block has {threads} threads, a device allows {}", device::MAX_THREADS));
    }
    if let Some(shape) = kernel.required_threads.filter(|&shape| shape != block) {
        return wrong(format!("the block is {block:?}, but the kernel was compiled for {shape:?} (.reqntid)"));
    }
    if threads > function.max_threads() {
        return wrong(format!(
            "the block has {threads} threads, the kernel was compiled for at most {} (.maxntid, __launch_bounds__)",
            function.max_threads()
        ));
    }
    Ok(())
}

fn check_shared(function: &Function, dynamic: u32) -> Answer {
    let fixed = function.kernel.static_shared;
    if fixed > device::SHARED_WITHOUT_OPT_IN {
        return refuse(
            Code::INVALID_VALUE,
            format!(
                "kernel {} has {fixed} bytes of static shared memory, a kernel may have {}",
                function.kernel.name,
                device::SHARED_WITHOUT_OPT_IN
            ),
        );
    }
    let most = function.max_dynamic_shared.load(Ordering::Relaxed);
    if dynamic > most {
        return refuse(
            Code::INVALID_VALUE,
            format!(
                "kernel {} was launched with {dynamic} bytes of dynamic shared memory, it is allowed {most}: \
                 set CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES first",
                function.kernel.name
            ),
        );
    }
    Ok(())
}

const PARAM_END: usize = 0;
const PARAM_BUFFER: usize = 1;
const PARAM_BUFFER_SIZE: usize = 2;

/// Lays the parameters out as the kernel declares them.
///
/// # Safety
/// `params` is null or has one pointer to each parameter's value; `extra` is null or a list as the manual describes it.
unsafe fn pack(function: &Function, params: *const *const c_void, extra: *const *const c_void) -> Answer<Vec<u8>> {
    let kernel = &function.kernel;
    let mut packed = vec![0u8; kernel.param_bytes as usize];
    if !params.is_null() && !extra.is_null() {
        return refuse(Code::INVALID_VALUE, "parameters come either as an array of pointers or as a buffer, not both");
    }
    if !params.is_null() {
        for (index, param) in kernel.params.iter().enumerate() {
            // SAFETY: the caller guarantees as many pointers as the kernel has parameters.
            let value = unsafe { params.add(index).read() };
            if value.is_null() {
                return refuse(
                    Code::INVALID_VALUE,
                    format!("kernel {}: the pointer to parameter {index} is null", kernel.name),
                );
            }
            let target = &mut packed[param.offset as usize..][..param.bytes as usize];
            // SAFETY: the caller guarantees that each points to as many bytes as the parameter has.
            unsafe {
                std::ptr::copy_nonoverlapping(value.cast(), target.as_mut_ptr(), target.len());
            }
        }
        return Ok(packed);
    }
    if extra.is_null() {
        return match kernel.params.len() {
            0 => Ok(packed),
            count => {
                refuse(Code::INVALID_VALUE, format!("kernel {} has {count} parameters, none were passed", kernel.name))
            }
        };
    }
    let (mut buffer, mut bytes) = (std::ptr::null::<u8>(), 0);
    let mut at = 0;
    loop {
        // SAFETY: the list ends with PARAM_END, and every other key has a value behind it.
        let (key, value) = unsafe {
            match extra.add(at).read() as usize {
                PARAM_END => break,
                key => (key, extra.add(at + 1).read()),
            }
        };
        match key {
            PARAM_BUFFER => buffer = value.cast(),
            // SAFETY: the value behind this key points to a size.
            PARAM_BUFFER_SIZE => bytes = unsafe { value.cast::<usize>().read_unaligned() },
            _ => {
                return refuse(Code::INVALID_VALUE, format!("launch option {key:#x} is not known"));
            }
        }
        at += 2;
    }
    let buffer = match buffer.is_null() {
        true => &[],
        // Bytes after the parameters are ignored.
        // SAFETY: the caller guarantees as many bytes as the list says the buffer has.
        false => unsafe { std::slice::from_raw_parts(buffer, bytes.min(kernel.param_bytes as usize)) },
    };
    pack_buffer(kernel, buffer)
}

/// Parameters from a buffer laid out as the kernel declares them. Bytes after the last are ignored.
pub fn pack_buffer(kernel: &Kernel, buffer: &[u8]) -> Answer<Vec<u8>> {
    let needed = kernel.params.last().map_or(0, |param| (param.offset + param.bytes) as usize);
    if buffer.len() < needed {
        let bytes = buffer.len();
        return refuse(
            Code::INVALID_VALUE,
            format!("kernel {} needs {needed} bytes of parameters, the buffer has {bytes}", kernel.name),
        );
    }
    let mut packed = vec![0u8; kernel.param_bytes as usize];
    let length = buffer.len().min(packed.len());
    packed[..length].copy_from_slice(&buffer[..length]);
    Ok(packed)
}

/// Checks a launch as a driver does and submits it. `pack` lays out the parameters.
pub fn launch(
    function: Handle,
    shape: Shape,
    stream: Handle,
    pack: impl FnOnce(&Function) -> Answer<Vec<u8>>,
) -> Answer {
    current()?;
    let function = driver()?.functions.get(function)?;
    let (context, _) = stream::resolve(stream)?;
    if function.image.context != context.handle {
        return refuse(
            Code::INVALID_HANDLE,
            format!("kernel {} and the stream belong to different contexts", function.kernel.name),
        );
    }
    let figures = device::figures(context.device()?);
    check_shape(&function, &figures, shape)?;
    check_shared(&function, shape.dynamic_shared)?;
    if shape.cooperative {
        let threads = shape.block.iter().product();
        let resident = occupancy::blocks_per_multiprocessor(&function, &figures, threads, shape.dynamic_shared)
            * figures.multiprocessors;
        let blocks: u64 = shape.grid.iter().map(|&count| u64::from(count)).product();
        if blocks > u64::from(resident) {
            return refuse(
                Code::COOPERATIVE_LAUNCH_TOO_LARGE,
                format!(
                    "kernel {}: a cooperative grid must be resident at once, {blocks} blocks are more than the \
                     {resident} that fit",
                    function.kernel.name
                ),
            );
        }
    }
    let params = pack(&function)?;
    stream::submit(stream, Work::Kernel(KernelLaunch { function, shape, params }))
}

/// CUlaunchAttribute: an id and 64 bytes whose meaning depends on it.
#[repr(C)]
pub struct Attribute {
    id: c_int,
    pad: [u8; 4],
    value: [u32; 16],
}

/// CUlaunchConfig.
#[repr(C)]
pub struct Config {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    dynamic_shared: c_uint,
    stream: Handle,
    attributes: *const Attribute,
    attribute_count: c_uint,
}

const ATTRIBUTE_COOPERATIVE: c_int = 2;
const ATTRIBUTE_CLUSTER: c_int = 4;
/// Attributes that only affect performance: nothing to do for an emulator.
const HINTS: [c_int; 9] = [0, 1, 3, 5, 6, 8, 9, 10, 14];

exports! { LAUNCH:
    fn cuLaunchKernel(
        function: Handle, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
        block_z: c_uint, dynamic_shared: c_uint, stream: Handle, params: *const *const c_void,
        extra: *const *const c_void,
    ) {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let shape = Shape { grid, block, dynamic_shared, cooperative: false };
        launch(function, shape, stream, |function| pack(function, params, extra))
    }

    fn cuLaunchCooperativeKernel(
        function: Handle, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
        block_z: c_uint, dynamic_shared: c_uint, stream: Handle, params: *const *const c_void,
    ) {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let shape = Shape { grid, block, dynamic_shared, cooperative: true };
        launch(function, shape, stream, |function| pack(function, params, std::ptr::null()))
    }

    fn cuLaunchKernelEx(
        config: *const Config, function: Handle, params: *const *const c_void, extra: *const *const c_void,
    ) {
        if config.is_null() {
            return refuse(Code::INVALID_VALUE, "the launch configuration is null");
        }
        let config = &*config;
        let mut cooperative = false;
        for at in 0..config.attribute_count as usize {
            let attribute = &*config.attributes.add(at);
            match attribute.id {
                ATTRIBUTE_COOPERATIVE => cooperative = attribute.value[0] != 0,
                ATTRIBUTE_CLUSTER if attribute.value[..3] == [1; 3] => (),
                ATTRIBUTE_CLUSTER => return refuse(Code::NOT_SUPPORTED, "clusters of blocks are not emulated"),
                id if HINTS.contains(&id) => (),
                id => return refuse(Code::NOT_SUPPORTED, format!("launch attribute {id} is not emulated")),
            }
        }
        let shape = Shape {
            grid: config.grid,
            block: config.block,
            dynamic_shared: config.dynamic_shared,
            cooperative,
        };
        launch(function, shape, config.stream, |function| pack(function, params, extra))
    }
}
