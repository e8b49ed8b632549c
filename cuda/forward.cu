// The crops.

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) forward(const Arguments a) {
    __shared__ Task task;
    __shared__ TapTable<Weight> along[2];
    __shared__ long long image;
    make_crops<false>(a, task, along, image);
}
