//! Kernel launches. Arguments are collected in parameter order, laid out like a struct of them, checked against the
//! kernel's parameters and passed to the driver.
//!
//! The arguments of a thousand launches per step cost no allocation: each launch reuses its thread's last argument
//! block.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::mem::offset_of;
use std::ops::{Deref, DerefMut};

use super::counters::{self, Counted};
use super::driver::result;
use super::trace::Trace;
use super::{Buffer, Gpu, driver_error};
use crate::error::Result;
use crate::kernels::clock::Clock;
use crate::kernels::sample_step::Turn;
use crate::kernels::{Kernel, Kind, Twin};
use crate::shape::{DType, Shape};

/// Bytes of dynamic shared memory that a kernel may use without opting in.
pub(super) const SHARED_DEFAULT: u32 = 48 << 10;

/// Most parameters a kernel may have.
const MOST_ARGUMENTS: usize = 32;

/// Threads per block of the element-wise kernels.
const THREADS: usize = 256;

/// A range of device memory to be read, such as a parameter's weights.
#[derive(Clone, Copy)]
pub struct View<'a> {
    buffer: &'a Buffer,
    offset: usize,
    bytes: usize,
}

/// A range of device memory to be written, such as a parameter's gradient. No other view of its buffer can exist
/// meanwhile.
pub struct ViewMut<'a> {
    buffer: &'a mut Buffer,
    offset: usize,
    bytes: usize,
}

/// A tensor as a kernel reads it: `shape` elements of type `dtype` at the start of `buffer`.
#[derive(Clone, Copy)]
pub struct Array<'a> {
    /// The memory.
    pub buffer: &'a Buffer,
    /// Extent.
    pub shape: Shape,
    /// Type of the elements.
    pub dtype: DType,
}

impl<'a> View<'a> {
    /// Bytes `offset..offset + bytes` of `buffer`.
    pub fn new(buffer: &'a Buffer, offset: usize, bytes: usize) -> Self {
        assert_inside(buffer, offset, bytes);
        View { buffer, offset, bytes }
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The memory, and the address in it at which the range begins.
    pub(super) fn place(&self) -> (&Buffer, u64) {
        (self.buffer, self.buffer.address() + self.offset as u64)
    }
}

impl<'a> ViewMut<'a> {
    /// Bytes `offset..offset + bytes` of `buffer`.
    pub fn new(buffer: &'a mut Buffer, offset: usize, bytes: usize) -> Self {
        assert_inside(buffer, offset, bytes);
        ViewMut { buffer, offset, bytes }
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The memory, and the address in it at which the range begins.
    pub(super) fn place(&self) -> (&Buffer, u64) {
        (self.buffer, self.buffer.address() + self.offset as u64)
    }
}

fn assert_inside(buffer: &Buffer, offset: usize, bytes: usize) {
    let end = offset.checked_add(bytes);
    assert!(end.is_some_and(|end| end <= buffer.bytes()), "{bytes} bytes from byte {offset} of {}", buffer.bytes());
}

/// The arguments of a launch.
#[derive(Default)]
struct Arguments {
    /// Their values, each at a multiple of its alignment. In u64 words, so that the block itself is aligned.
    block: Vec<u64>,
    /// Bytes of `block` in use.
    len: usize,
    list: Vec<Argument>,
    /// The arrays whose addresses are in a struct: address, bytes, whether the kernel writes it.
    in_structs: Vec<(u64, usize, bool)>,
}

#[derive(Clone, Copy)]
struct Argument {
    /// Its byte offset in the block.
    offset: usize,
    bytes: usize,
    kind: Kind,
    what: What,
}

/// How to describe an argument in a message, which is formatted only if needed.
#[derive(Clone, Copy)]
enum What {
    Array(Shape, DType),
    Bytes(usize),
    Null,
    Number,
    /// A signed 32-bit integer.
    Signed,
    /// Formats the struct with these bytes.
    Struct(fn(&[u8], &mut fmt::Formatter<'_>) -> fmt::Result),
}

impl Arguments {
    /// Appends a value.
    fn push<T: bytemuck::Pod>(&mut self, value: T, kind: Kind, what: What) {
        let offset = self.len.next_multiple_of(align_of::<T>());
        let end = offset + size_of::<T>();
        self.block.resize(self.block.len().max(end.div_ceil(8)), 0);
        bytemuck::cast_slice_mut(&mut self.block)[offset..end].copy_from_slice(bytemuck::bytes_of(&value));
        self.len = end;
        self.list.push(Argument { offset, bytes: size_of::<T>(), kind, what });
    }

    fn bytes(&self, argument: &Argument) -> &[u8] {
        &bytemuck::cast_slice(&self.block)[argument.offset..argument.offset + argument.bytes]
    }

    /// True if their number and kinds, structs included, match the kernel's parameters. A writable argument may be
    /// passed to a read-only parameter.
    fn fit(&self, kernel: &Kernel) -> bool {
        let fits = |(argument, (kind, _)): (&Argument, &(Kind, &str))| match (kind, argument.kind) {
            (Kind::Pointer, Kind::PointerMut) => true,
            // A null pointer is neither read nor written.
            (Kind::PointerMut, Kind::Pointer) => matches!(argument.what, What::Null),
            (parameter, argument) => *parameter == argument,
        };
        self.list.len() == kernel.params.len() && self.list.iter().zip(kernel.params).all(fits)
    }

    /// One argument in words.
    fn describe(&self, argument: &Argument) -> String {
        struct Described<'a>(&'a Arguments, &'a Argument);
        impl fmt::Display for Described<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let bytes = self.0.bytes(self.1);
                match (self.1.what, self.1.kind) {
                    (What::Array(shape, dtype), _) => write!(f, "{shape} {dtype:?}"),
                    (What::Bytes(bytes), _) => write!(f, "{bytes} bytes"),
                    (What::Null, _) => f.write_str("null"),
                    (What::Signed, _) => write!(f, "{}", bytemuck::pod_read_unaligned::<i32>(bytes)),
                    (What::Struct(show), _) => show(bytes, f),
                    (What::Number, Kind::U32) => write!(f, "{}", bytemuck::pod_read_unaligned::<u32>(bytes)),
                    (What::Number, Kind::F32) => write!(f, "{}", bytemuck::pod_read_unaligned::<f32>(bytes)),
                    (What::Number, Kind::F64) => write!(f, "{}", bytemuck::pod_read_unaligned::<f64>(bytes)),
                    (What::Number, _) => write!(f, "{}", bytemuck::pod_read_unaligned::<u64>(bytes)),
                }
            }
        }
        Described(self, argument).to_string()
    }
}

thread_local! {
    /// The arguments of this thread's last launch, for reuse.
    static SPARE: Cell<Option<Box<Arguments>>> = const { Cell::new(None) };
}

/// [`Arguments`] that return to [`SPARE`] when dropped.
struct Reused(Option<Box<Arguments>>);

impl Reused {
    fn new() -> Self {
        let mut arguments = SPARE.take().unwrap_or_default();
        arguments.len = 0;
        arguments.list.clear();
        arguments.in_structs.clear();
        Reused(Some(arguments))
    }
}

impl Deref for Reused {
    type Target = Arguments;

    fn deref(&self) -> &Arguments {
        self.0.as_ref().expect("taken by drop alone")
    }
}

impl DerefMut for Reused {
    fn deref_mut(&mut self) -> &mut Arguments {
        self.0.as_mut().expect("taken by drop alone")
    }
}

impl Drop for Reused {
    fn drop(&mut self) {
        SPARE.set(self.0.take());
    }
}

/// A launch under construction.
#[must_use = "a launch happens in run()"]
pub struct Launch<'a> {
    gpu: &'a Gpu,
    kernel: &'static Kernel,
    grid: [usize; 3],
    block: [u32; 3],
    shared: u32,
    /// Blocks of each kind; empty if all are alike.
    kinds: Vec<usize>,
    arguments: Reused,
    /// The arguments borrow their buffers.
    borrowed: PhantomData<&'a Buffer>,
}

/// A launch as passed to the driver, for tests that compare launches.
#[derive(Clone, Debug, PartialEq)]
pub struct Launched {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Blocks along x, y and z.
    pub grid: [usize; 3],
    /// Threads along x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// Name of each parameter and the bytes of its argument.
    pub arguments: Vec<(&'static str, Vec<u8>)>,
}

/// `threads` along x, or along x, y and z.
pub trait Block {
    /// Along x, y and z.
    fn extent(self) -> [u32; 3];
}

impl Block for u32 {
    fn extent(self) -> [u32; 3] {
        [self, 1, 1]
    }
}

impl Block for [u32; 3] {
    fn extent(self) -> [u32; 3] {
        self
    }
}

/// Grid for a kernel with four neighbouring elements per thread and 256 threads per block: large enough to hide
/// latency, small enough for eight blocks per multiprocessor.
pub fn each_four(len: usize) -> [usize; 3] {
    [len.div_ceil(4 * THREADS), 1, 1]
}

/// The same for each of `images` images of `image` elements, images along y. The kernel loops over them if there are
/// more than the 65535 that a grid allows.
pub fn each_four_of_images(images: usize, image: usize) -> [usize; 3] {
    [image.div_ceil(4 * THREADS), images.min(65535), 1]
}

impl Gpu {
    /// A launch of `kernel` over `grid` blocks. An empty grid launches nothing.
    ///
    /// For the operations, which guarantee what the kernel's header demands of the host. Others use
    /// [`Gpu::launch_any`].
    pub(crate) fn launch(&self, kernel: &'static Kernel, grid: [usize; 3], block: impl Block) -> Launch<'_> {
        let block = block.extent();
        let threads: u32 = block.iter().product();
        assert!(
            threads > 0 && threads <= kernel.max_threads,
            "{}: blocks of {threads} threads, its bound is {}",
            kernel.name,
            kernel.max_threads
        );
        let arguments = Reused::new();
        Launch { gpu: self, kernel, grid, block, shared: 0, kinds: Vec::new(), arguments, borrowed: PhantomData }
    }

    /// A launch of `kernel` with arguments of the caller's choice.
    ///
    /// # Safety
    /// Shapes, sizes and contents of the arguments must be what the kernel's header demands of the host: nothing else
    /// stops a kernel from accessing other memory.
    pub unsafe fn launch_any(&self, kernel: &'static Kernel, grid: [usize; 3], block: impl Block) -> Launch<'_> {
        self.launch(kernel, grid, block)
    }
}

impl<'a> Launch<'a> {
    /// Sets the dynamic shared memory, in bytes.
    pub fn shared(mut self, bytes: usize) -> Self {
        self.shared = u32::try_from(bytes).expect("shared memory is some kilobytes");
        self
    }

    /// The blocks along x are of several kinds, so many of each, one kind after the other: for the profile, which runs
    /// some of them.
    pub fn kinds(mut self, kinds: &[usize]) -> Self {
        if self.gpu.inner.counted.get().is_some() {
            self.kinds = kinds.to_vec();
        }
        self
    }

    /// An array that the kernel reads.
    pub fn array(self, Array { buffer, shape, dtype }: Array<'a>) -> Self {
        self.pointer(buffer, 0, Kind::Pointer, What::Array(shape, dtype))
    }

    /// The same, or a null pointer.
    pub fn array_opt(self, array: Option<Array<'a>>) -> Self {
        match array {
            Some(array) => self.array(array),
            None => self.null(),
        }
    }

    /// An array that the kernel writes: `shape` elements of type `dtype` at the start of `buffer`.
    pub fn array_mut(self, buffer: &'a mut Buffer, shape: Shape, dtype: DType) -> Self {
        self.pointer(buffer, 0, Kind::PointerMut, What::Array(shape, dtype))
    }

    /// A null pointer.
    pub fn null(self) -> Self {
        self.argument(0u64, Kind::Pointer, What::Null)
    }

    /// The first argument again, for reading: for a kernel that overwrites its input.
    pub fn first_again(self) -> Self {
        let first = self.arguments.list[0];
        let address: u64 = bytemuck::pod_read_unaligned(self.arguments.bytes(&first));
        self.argument(address, Kind::Pointer, first.what)
    }

    /// A range of a buffer that the kernel reads.
    pub fn view(self, view: View<'a>) -> Self {
        self.pointer(view.buffer, view.offset, Kind::Pointer, What::Bytes(view.bytes))
    }

    /// The same, or a null pointer.
    pub fn view_opt(self, view: Option<View<'a>>) -> Self {
        match view {
            Some(view) => self.view(view),
            None => self.null(),
        }
    }

    /// A range of a buffer that the kernel writes.
    pub fn view_mut(self, view: ViewMut<'a>) -> Self {
        self.pointer(view.buffer, view.offset, Kind::PointerMut, What::Bytes(view.bytes))
    }

    /// A whole buffer that is no tensor, which the kernel reads.
    pub fn buffer(self, buffer: &'a Buffer) -> Self {
        self.pointer(buffer, 0, Kind::Pointer, What::Bytes(buffer.bytes()))
    }

    /// The same, which the kernel writes.
    pub fn buffer_mut(self, buffer: &'a mut Buffer) -> Self {
        self.pointer(buffer, 0, Kind::PointerMut, What::Bytes(buffer.bytes()))
    }

    /// The same, or a null pointer.
    pub fn buffer_mut_opt(self, buffer: Option<&'a mut Buffer>) -> Self {
        match buffer {
            Some(buffer) => self.buffer_mut(buffer),
            None => self.null(),
        }
    }

    /// The clock of the training step this launch belongs to, or a null pointer.
    pub fn clock(self) -> Self {
        match self.gpu.clock() {
            Some((buffer, _)) => self.buffer(buffer),
            None => self.null(),
        }
    }

    /// The turn of the reverse step this launch belongs to, or a null pointer.
    pub fn turn(self) -> Self {
        match self.gpu.turn() {
            Some((buffer, _)) => self.buffer(buffer),
            None => self.null(),
        }
    }

    /// The timestep of that turn, for reading. Panics without a turn.
    pub fn time_of_turn(self) -> Self {
        let (buffer, _) = self.gpu.turn().expect("a launch that reads the timestep of a turn belongs to one");
        self.view(View::new(buffer, offset_of!(Turn, time), size_of::<f32>()))
    }

    /// The contents of that clock.
    pub fn now(&self) -> Option<&'a Clock> {
        self.gpu.clock().map(|(_, now)| now)
    }

    /// The address of a range of a buffer that the kernel reads, for a struct among the arguments.
    pub fn address_in_struct(&mut self, view: View<'a>) -> u64 {
        let (buffer, address) = view.place();
        self.gpu.owns(buffer);
        self.arguments.in_structs.push((address, view.bytes, false));
        address
    }

    /// The same of one that the kernel writes.
    pub fn address_in_struct_mut(&mut self, view: ViewMut<'a>) -> u64 {
        let (buffer, address) = view.place();
        self.gpu.owns(buffer);
        self.arguments.in_structs.push((address, view.bytes, true));
        address
    }

    /// A 32-bit integer.
    pub fn u32(self, v: usize) -> Self {
        let value = u32::try_from(v).unwrap_or_else(|_| panic!("{}: {v} for a 32-bit parameter", self.kernel.name));
        self.argument(value, Kind::U32, What::Number)
    }

    /// A signed 32-bit integer.
    pub fn i32(self, v: isize) -> Self {
        let value = i32::try_from(v).unwrap_or_else(|_| panic!("{}: {v} for a 32-bit parameter", self.kernel.name));
        self.argument(value, Kind::U32, What::Signed)
    }

    /// A 64-bit integer.
    pub fn u64(self, v: usize) -> Self {
        self.argument(v as u64, Kind::U64, What::Number)
    }

    /// A float.
    pub fn f32(self, v: f32) -> Self {
        self.argument(v, Kind::F32, What::Number)
    }

    /// A double.
    pub fn f64(self, v: f64) -> Self {
        self.argument(v, Kind::F64, What::Number)
    }

    /// A struct with a twin in CUDA, by value.
    pub fn value<T: Twin>(self, v: T) -> Self {
        let show =
            |bytes: &[u8], f: &mut fmt::Formatter<'_>| write!(f, "{:?}", bytemuck::pod_read_unaligned::<T>(bytes));
        self.argument(v, Kind::Struct(T::NAME, size_of::<T>()), What::Struct(show))
    }

    fn pointer(self, buffer: &Buffer, offset: usize, kind: Kind, what: What) -> Self {
        self.gpu.owns(buffer);
        self.argument(buffer.address() + offset as u64, kind, what)
    }

    fn argument<T: bytemuck::Pod>(mut self, value: T, kind: Kind, what: What) -> Self {
        self.arguments.push(value, kind, what);
        self
    }

    /// Launches; does not wait.
    ///
    /// # Errors
    /// A driver error, with kernel, grid and arguments. An error inside the kernel is reported by a later call.
    pub fn run(self) -> Result<()> {
        let (kernel, arguments) = (self.kernel, &*self.arguments);
        assert!(
            arguments.fit(kernel),
            "{} takes {:?}, but was launched with {:?}",
            kernel.name,
            kernel.params,
            arguments.list.iter().map(|a| (a.kind, arguments.describe(a))).collect::<Vec<_>>()
        );
        if self.grid.contains(&0) {
            return Ok(());
        }
        let [x, y, z] = self.grid;
        assert!(
            x <= i32::MAX as usize && y <= 65535 && z <= 65535,
            "{}: a grid of {x} x {y} x {z} blocks",
            kernel.name
        );
        if matches!(self.gpu.inner.trace, Trace::Print) {
            eprintln!("{}", self.describe());
        }
        if let Some(record) = self.gpu.inner.record.get() {
            record.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(self.launched());
        }
        let _ordered = self.gpu.ordered();
        let function = self.gpu.function(kernel, self.shared)?;
        let failed = |e| driver_error(&format!("launching {}", self.describe()), e);
        self.gpu.bind()?;
        assert!(arguments.list.len() <= MOST_ARGUMENTS, "{}: {} arguments", kernel.name, arguments.list.len());
        let mut pointers = [std::ptr::null_mut::<c_void>(); MOST_ARGUMENTS];
        let block = arguments.block.as_ptr().cast::<u8>();
        for (pointer, argument) in pointers.iter_mut().zip(&arguments.list) {
            // SAFETY: every argument lies in the block.
            *pointer = unsafe { block.add(argument.offset) }.cast_mut().cast();
        }
        let stream = &self.gpu.inner.stream;
        // SAFETY: number, kinds and sizes of the arguments are those of the kernel's parameters: checked above, and a
        // struct of the same name has the layout that build.rs read and whose size it compared with the PTX. The driver
        // only reads the block. Memory behind the pointers stays alive until the stream has passed this launch, since
        // the pool reuses it in stream order. Everything the kernel may write was borrowed mutably by this launch; what
        // it reads may be shared, or be the first argument again. That a kernel stays inside its arguments is its own
        // contract: stated in its header, kept by the operations (or the caller of `launch_any`) and tested under the
        // emulator's checks.
        let launch = || unsafe {
            result::launch_kernel(
                function.handle,
                (x as u32, y as u32, z as u32),
                self.block.into(),
                self.shared,
                stream.cu_stream(),
                &mut pointers[..arguments.list.len()],
            )
        };
        if !self.kinds.is_empty() {
            counters::say_kinds(&self.kinds)?;
        }
        self.gpu.inner.trace.around(kernel.name, stream, launch).map_err(failed)?;
        if !self.kinds.is_empty() {
            counters::say_kinds(&[])?;
        }
        if let Some(counted) = self.gpu.inner.counted.get() {
            let launch = self.counted(counters::of_last_launch()?);
            counted.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(launch);
        }
        self.gpu.note_launch();
        if matches!(self.gpu.inner.trace, Trace::Sync) {
            self.gpu.watch_ranks(|| self.gpu.is_idle())?;
            stream.synchronize().map_err(|e| driver_error(&format!("running {}", self.describe()), e))?;
        }
        Ok(())
    }

    fn describe(&self) -> String {
        let ([x, y, z], [bx, by, bz]) = (self.grid, self.block);
        let arguments = self.arguments.list.iter().map(|a| self.arguments.describe(a)).collect::<Vec<_>>();
        format!(
            "{} on {x}x{y}x{z} blocks of {bx}x{by}x{bz} threads, {} bytes of shared memory, ({})",
            self.kernel.name,
            self.shared,
            arguments.join(", ")
        )
    }

    fn counted(&self, counters: counters::Counters) -> Counted {
        // By address, since an array may be passed twice.
        let mut arrays = [BTreeMap::new(), BTreeMap::new()];
        for (argument, (kind, _)) in self.arguments.list.iter().zip(self.kernel.params) {
            let bytes = match argument.what {
                What::Array(shape, dtype) => shape.len() * dtype.size(),
                What::Bytes(bytes) => bytes,
                _ => continue,
            };
            let address: u64 = bytemuck::pod_read_unaligned(self.arguments.bytes(argument));
            let known = arrays[usize::from(*kind == Kind::PointerMut)].entry(address).or_insert(0);
            *known = bytes.max(*known);
        }
        for &(address, bytes, written) in &self.arguments.in_structs {
            let known = arrays[usize::from(written)].entry(address).or_insert(0);
            *known = bytes.max(*known);
        }
        Counted {
            kernel: self.kernel.name.into(),
            blocks: self.grid.iter().map(|n| *n as u64).product(),
            threads: self.block.iter().product(),
            shared: self.shared,
            arrays: arrays.map(|known| known.into_values().map(|bytes| bytes as u64).sum()),
            counters,
        }
    }

    fn launched(&self) -> Launched {
        let names = self.kernel.params.iter().map(|(_, name)| *name);
        let bytes = self.arguments.list.iter().map(|a| self.arguments.bytes(a).to_vec());
        Launched {
            kernel: self.kernel.name,
            grid: self.grid,
            block: self.block,
            shared: self.shared,
            arguments: names.zip(bytes).collect(),
        }
    }
}
